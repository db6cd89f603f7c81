"""The vLLM worker's side: our weight transfers, and the fingerprints of what any transfer brings.

Only vLLM's workers import it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from rlad_megatron.errors import CheckpointError
from rlad_megatron.models.fingerprint import fingerprint
from rlad_megatron.models.gathered import TensorMetadata
from rlad_megatron.models.load import HfCheckpoint
from rlad_megatron.servers.transfer.choice import COLLECTIVE
from rlad_megatron.servers.transfer.membership import MembershipError, error_of
from rlad_megatron.servers.transfer.receiver import Invitation, Receiver
from rlad_megatron.servers.transfer.shared_memory import tensors_of_file

LOG = logging.getLogger(f"vllm.{__name__}")  # below vLLM's own, which has a handler
FINGERPRINTS_AHEAD = 2  # tensors that wait for theirs: they are held in memory


@dataclass
class SharedMemoryInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryUpdateInfo(WeightTransferUpdateInfo):
    """Where the weights are, and the version that they must have."""

    path: str
    version: int


class CheckpointEngine(WeightTransferEngine[Any, Any]):
    """Loads whole tensors as a checkpoint.

    Each worker gets all of them and keeps what its own tensor-parallel rank needs, as at start-up.
    """

    _begun = False  # an update that has not been finished

    def start_weight_update(self) -> None:
        if self._begun:
            self._undo()
        self._begun = True
        # vLLM repacks weights after loading (always on CPUs). Loading into the repacked ones would be silently wrong;
        # this restores the checkpoint's shapes until `finish_weight_update`.
        # Names are taken before that, while tied parameters are still one and counted once.
        self._expected = {name for name, _ in self.model.named_parameters()}
        self._tied = _tied_modules(self.model)
        initialize_layerwise_reload(self.model)
        self._kernels = _forget_kernels_of_experts(self.model) if self.device.type == "cpu" else []

    def _undo(self) -> None:
        """After an update that failed: give layers that lack some of their new weights their old ones.

        vLLM would go on with what they have got, and a tied layer would stay apart from its embedding.
        """
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            info.loaded_weights.clear()
            info.load_numel = 0
        self._finalize()

    def _load(self, tensors: Iterable[tuple[str, torch.Tensor]], origin: str) -> None:
        """ValueError if a parameter of the model gets no tensor."""
        loaded = self.model.load_weights(tensors)
        # A parameter that no tensor reaches would silently keep its old values.
        if loaded is not None and self.model_config.quantization is None:
            missing = self._expected - set(loaded)
            if missing:
                raise ValueError(f"{origin} has no weights for {sorted(missing)[:5]}")

    def _finalize(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)
        for method, kernel in self._kernels:
            method.moe_kernel = method.moe_kernel or kernel  # nothing was loaded

    def finish_weight_update(self) -> None:
        self._finalize()
        # A tied output layer receives no tensor itself, so vLLM does not repack it; on CPUs it would keep computing
        # with its packed copy of the old embedding.
        for module in self._tied:
            module.quant_method.process_weights_after_loading(module)
        self._begun = False


class SharedMemoryWeightTransferEngine(CheckpointEngine):
    """Maps the trainer's file."""

    init_info_cls = SharedMemoryInitInfo
    update_info_cls = SharedMemoryUpdateInfo

    def init_transfer_engine(self, init_info: SharedMemoryInitInfo) -> None:
        pass

    def receive_weights(self, update_info: SharedMemoryUpdateInfo) -> None:
        """Load the file. ValueError if it holds another version or lacks a parameter of the model."""
        self._load(tensors_of_file(Path(update_info.path), update_info.version), update_info.path)

    def shutdown(self) -> None:
        pass


@dataclass
class CollectiveInitInfo(Invitation, WeightTransferInitInfo):
    """As the trainer sends it."""


@dataclass
class CollectiveUpdateInfo(WeightTransferUpdateInfo):
    """The version, for the log: what arrives is what the trainer sends now."""

    version: int


class CollectiveWeightTransferEngine(CheckpointEngine):
    """Receives buckets from the owners of the trainer's weights.

    What the trainer calls does not raise but keeps the error, which the trainer reads (`transfer_error`). If one worker
    of a server raises, vLLM does not wait for the others, and takes their answers for those to its next call.
    """

    init_info_cls = CollectiveInitInfo
    update_info_cls = CollectiveUpdateInfo
    error = ""  # of the last call
    _receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: CollectiveInitInfo) -> None:
        """Join. It is an error if the trainer's model is not the one of this server's folder."""
        self.error = error_of(f"worker {self._worker}", lambda: self._join(init_info))

    def receive_weights(self, update_info: CollectiveUpdateInfo) -> None:
        """Load what comes. It is an error if a parameter of the model gets no tensor."""
        self.error = error_of(f"worker {self._worker}", self._receive)
        LOG.info("weights of version %d: %s", update_info.version, self.error or "loaded")

    def finish_weight_update(self) -> None:
        if self.error:  # in another engine of a data-parallel server than the one that told the trainer
            raise RuntimeError(self.error)
        super().finish_weight_update()

    @property
    def _worker(self) -> int:
        """Index in this server."""
        parallel = self.parallel_config
        return parallel.data_parallel_index * parallel.world_size + parallel.rank

    def _join(self, told: Invitation) -> None:
        self._receiver = Receiver(told, self._worker, self.device)
        try:
            check_same_model(self._receiver.tensors, Path(self.model_config.model))
        except MembershipError:
            self.shutdown()  # so that its neighbours notice
            raise

    def _receive(self) -> None:
        if self._receiver is None:
            raise MembershipError("this worker has not joined the trainer's group")
        self._receiver.receive(lambda tensors: self._load(tensors, "the trainer"))

    def shutdown(self) -> None:
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None


def check_same_model(sent: Sequence[TensorMetadata], folder: Path) -> None:
    """Raise MembershipError naming the first tensor that this server's model lacks or has in another shape.

    folder: of that model.
    """
    try:
        checkpoint = HfCheckpoint(folder)
    except CheckpointError:
        return  # not safetensors: vLLM's loader says what does not fit
    for tensor in sent:
        found = checkpoint.shape(tensor.name) if tensor.name in checkpoint.stored else None
        if found != tensor.shape:
            raise MembershipError(
                f"the trainer sends {tensor.name} {list(tensor.shape)}, but the model of this server, {folder}, has "
                f"{'no such tensor' if found is None else list(found)}; start the server from student.path"
            )


def _tied_modules(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that vLLM post-processes, and whose `weight` is one that an earlier module has."""
    seen, tied = set[int](), []
    for module in model.modules():
        if isinstance(getattr(module, "quant_method", None), QuantizeMethodBase) and "weight" in module._parameters:
            weight = id(module._parameters["weight"])
            if weight in seen:
                tied.append(module)
            seen.add(weight)
    return tied


def _forget_kernels_of_experts(model: torch.nn.Module) -> list[tuple[Any, Any]]:
    """Make vLLM pack the weights of experts again when they are loaded; returns each method's kernel.

    On CPUs `UnquantizedFusedMoEMethod._setup_kernel` packs them only where it makes the kernel, so those of an update
    would be taken for packed ones. On GPUs nothing is packed there, and CUDA graphs hold on to the kernel.
    """
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    kernels = [(method, method.moe_kernel) for method in methods if isinstance(method, UnquantizedFusedMoEMethod)]
    for method, _ in kernels:
        method.moe_kernel = None
    return kernels


class FingerprintRecorder:
    """Methods of every worker (`--worker-extension-cls`), called through vLLM's collective_rpc around a push."""

    # The worker's own.
    get_model: Callable[[], torch.nn.Module]
    weight_transfer_engine: Any
    _weight_update_active: bool

    def record_fingerprints(self) -> None:
        """From now on, take the fingerprint of each tensor that the model's loader is given."""
        model = self.get_model()
        model.__dict__.pop("load_weights", None)  # of a push that failed
        load, found = model.load_weights, dict[str, torch.Tensor]()

        def load_recorded(weights: Iterable[tuple[str, torch.Tensor]]) -> object:
            # On a CPU, while the loader copies. A GPU has a queue anyway.
            with ThreadPoolExecutor(1) as thread:
                pending = deque[Future[None]]()

                def take(name: str, tensor: torch.Tensor) -> None:
                    found[name] = fingerprint(tensor)

                def recorded() -> Iterator[tuple[str, torch.Tensor]]:
                    for name, tensor in weights:
                        if tensor.is_cpu:
                            wait_for(pending, FINGERPRINTS_AHEAD - 1)
                            pending.append(thread.submit(take, name, tensor))
                        else:
                            take(name, tensor)
                        yield name, tensor

                result = load(recorded())
                wait_for(pending, 0)
                return result

        self._fingerprints = found
        model.__dict__["load_weights"] = load_recorded

    def recorded_fingerprints(self) -> dict[str, int]:
        """Stop recording; returns the fingerprint of each tensor by its Hugging Face name."""
        self.get_model().__dict__.pop("load_weights", None)
        return {name: value.item() for name, value in self._fingerprints.items()}

    def leave_transfer(self) -> str:
        """Leave the trainer's group, and an update that was broken off. Returns why this worker cannot join, if so."""
        engine = self.weight_transfer_engine
        if not isinstance(engine, CollectiveWeightTransferEngine):
            return f"""it was not started with --weight-transfer-config '{{"backend": "{COLLECTIVE}"}}'"""
        self._weight_update_active = False  # else vLLM refuses the next update, which first undoes this one
        engine.shutdown()
        return ""

    def transfer_error(self) -> str:
        """What went wrong in the last call of this worker's transfer engine, or nothing."""
        return self.weight_transfer_engine.error


def wait_for(pending: deque[Future[None]], most: int) -> None:
    """Wait until no more than `most` are left, the oldest first; raises their errors."""
    while len(pending) > most:
        pending.popleft().result()
