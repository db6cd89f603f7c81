"""The fused loss against its three matrix products and against other schemes, on the same tensors in one run.

    python benchmarks/loss.py                         # CPU, 1 and 2 ranks, float32 and bf16
    python benchmarks/loss.py --tokens 8192 --hidden 4096 --chunk 2048 --ranks 1 --dtypes bf16    # one GPU

Writes benchmarks/results/loss_<device>.json and .png; runs of other ranks and dtypes at the same sizes stay in it.
Ratios are medians over paired rounds. The base is bare products (`torch.mm`) with this rank's real rows of the head,
into preallocated buffers. The bar on CPUs in float32 is 1.35 times the three products. "into main_grad" adds to the
optimizer's buffer, as training does; the other schemes allocate the gradient. Memory is the peak beyond the inputs,
gradients included. The fused loss is also measured with a quarter of the tokens, and has a bar: 1.5 times a chunk's
float32 logits, plus the gradients. The error is that of the gradients of weight and hidden states (norm of the
difference over norm) against float64, on the first tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import loss_schemes
import measure
import torch
import torch.distributed as dist
from torch import multiprocessing

from rlad_megatron import platform
from rlad_megatron.objectives.trrd import trrd
from rlad_megatron.parallel.fused_linear_loss import fused_linear_log_probs
from rlad_megatron.parallel.linear_head import LinearHead
from rlad_megatron.parallel.loss_memory import padded_vocab_size
from rlad_megatron.trainer.loss import fused_linear_trrd

TRRD = {"alpha": 0.5, "teacher_clamp": 1.0, "eps_low": 0.2, "eps_high": 0.28}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ORACLE_TOKENS = 64
FUSED, IN_PLACE = "fused (ours)", "fused, into main_grad (ours)"
PRODUCTS, CHUNKED = "three products", "chunked with recompute"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    target = Path(__file__).parent / "results" / f"loss_{'gpu' if torch.cuda.is_available() else 'cpu'}"
    sizes = {name: getattr(options, name) for name in ("tokens", "hidden", "vocab", "chunk", "repeats")}
    result = {"machine": measure.machine(), "sizes": sizes, "runs": _kept_runs(target.with_suffix(".json"), sizes)}
    for ranks in options.ranks:
        for dtype in options.dtypes:
            context = multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            port = 29_500 + os.getpid() % 1000
            arguments = (ranks, dtype, options, port, queue)
            multiprocessing.start_processes(_rank, args=arguments, nprocs=ranks, start_method="spawn")
            command = " ".join(["python", *sys.argv])
            run = {"ranks": ranks, "dtype": dtype, "command": command, "schemes": queue.get()}
            _print(run)
            others = [old for old in result["runs"] if (old["ranks"], old["dtype"]) != (ranks, dtype)]
            result["runs"] = sorted([*others, run], key=lambda run: (run["ranks"], run["dtype"] != "fp32"))
    target.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    _plot(result, target.with_suffix(".png"))
    print(f"wrote {target}.json and .png")


def _kept_runs(file: Path, sizes: dict[str, int]) -> list[dict]:
    """Earlier runs on this machine at the same sizes. Each holds its own products, so they can be shown together."""
    if not file.exists():
        return []
    found = json.loads(file.read_text())
    return found["runs"] if (found["machine"], found["sizes"]) == (measure.machine(), sizes) else []


def _rank(rank: int, ranks: int, dtype: str, options: argparse.Namespace, port: int, queue) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    platform.setup()
    if not platform.has_cuda():
        torch.set_num_threads(1)
    platform.init_process_group(600)
    result = _measure(options, DTYPES[dtype])
    if rank == 0:
        queue.put(result)
    dist.barrier()
    dist.destroy_process_group()


def _measure(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, dict[str, float]]:
    """Every scheme's time, memory and error on this rank's shard."""
    group = dist.group.WORLD
    case = _Case(options, dtype)
    schemes = case.schemes(group)
    products = case.products()
    one_product = case.one_product()

    def scoring() -> None:
        fused_linear_log_probs(case.hidden, case.target, case.head(group))

    # The schemes that matter most run next to each other, because the machine's speed varies.
    steps = {name: case.step(scheme) for name, scheme in schemes.items()}
    actions = {CHUNKED: steps.pop(CHUNKED), FUSED: steps.pop(FUSED), PRODUCTS: products, IN_PLACE: steps.pop(IN_PLACE)}
    actions |= {"one product": one_product, "fused log-probs (ours)": scoring} | steps
    seconds = measure.paired_seconds(actions, options.repeats, before=case.clear)
    results = {}
    for name, times in seconds.items():
        base = PRODUCTS if name in schemes or name == PRODUCTS else "one product"
        results[name] = {
            "seconds": statistics.median(times),
            "ratio": measure.median_ratio(times, seconds[base]),
            "ratio_to": base,
        }
        if name in schemes:
            results[name]["times_of_fused"] = measure.median_ratio(times, seconds[FUSED])
            results[name]["times_of_fused_in_place"] = measure.median_ratio(times, seconds[IN_PLACE])
    for name in (*schemes, "fused log-probs (ours)"):
        results[name]["extra_peak_mb"] = case.peak_mb(actions[name])
    results[FUSED]["extra_peak_mb_quarter"] = case.peak_mb(case.step(schemes[FUSED], slice(options.tokens // 4)))
    results[FUSED]["extra_peak_mb_bar"] = case.peak_bar_mb()
    for name, scheme in schemes.items():
        results[name]["error"] = case.error(scheme)
    return results


class _Case:
    """The tensors of a run and the actions on them."""

    def __init__(self, options: argparse.Namespace, dtype: torch.dtype) -> None:
        device = platform.device()
        generator = torch.Generator().manual_seed(0)
        ranks, rank = dist.get_world_size(), dist.get_rank()
        self.options, self.vocab, self.chunk = options, options.vocab, options.chunk
        self.hidden = torch.randn(options.tokens, options.hidden, generator=generator).to(device, dtype)
        # Every rank draws the whole weight, so the model does not depend on the number of ranks. Padding is 0.
        self.whole = torch.zeros(padded_vocab_size(self.vocab, ranks), options.hidden, dtype=dtype)
        real = torch.randn(self.vocab, options.hidden, generator=generator) * options.hidden**-0.5
        self.whole[: self.vocab] = real
        self.weight = self.whole.chunk(ranks)[rank].clone().to(device)
        self.target = torch.randint(0, self.vocab, (options.tokens,), generator=generator).to(device)
        noise = torch.randn(3, options.tokens, generator=generator).to(device)
        log_probs, _ = fused_linear_log_probs(self.hidden, self.target, self.head(dist.group.WORLD))
        self.old, self.teacher, self.advantage = log_probs + 0.1 * noise[0], log_probs + noise[1], noise[2]
        self.main_grad = torch.zeros_like(self.weight, dtype=torch.float32)
        self.token_weight = torch.full((options.tokens,), 1 / options.tokens, device=device)
        self.hidden.requires_grad_()
        self.weight.requires_grad_()
        # The rows without padding, as a separate leaf, for schemes that do not mask it.
        num_real = self.head(dist.group.WORLD).num_real
        real = self.weight.detach()[:num_real].requires_grad_()
        self.shard = loss_schemes.Shard(real, rank * self.weight.shape[0], dist.group.WORLD)

    def head(self, group) -> LinearHead:
        return LinearHead(self.weight, self.vocab, group, 1.0, self.chunk)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = self.shard.weight_VH.grad = None

    def peak_mb(self, action: Callable) -> float:
        self.clear()
        peak = measure.peak_bytes(action) / 1e6
        self.clear()
        return peak

    def peak_bar_mb(self) -> float:
        gradients = 4 * self.weight.numel() + self.hidden.numel() * self.hidden.element_size()
        if self.weight.dtype != torch.float32:  # autograd gets the weight's gradient in the weight's dtype
            gradients += self.weight.numel() * self.weight.element_size()
        return (1.5 * self.chunk * self.weight.shape[0] * 4 + gradients) / 1e6

    def schemes(self, group) -> dict[str, Callable]:
        """name -> (hidden, tokens) -> loss"""

        def fused(hidden, tokens, main_grad=None):
            per_token = (self.target, self.old, self.teacher, self.advantage, self.token_weight)
            loss, _ = fused_linear_trrd(
                hidden,
                self.weight,
                *(value[tokens] for value in per_token),
                vocab_size=self.vocab,
                group=group,
                chunk_tokens=self.chunk,
                main_grad_VH=main_grad,
                **TRRD,
            )
            return loss

        def from_log_probs(log_probs):
            def loss(hidden, tokens):
                surrogate, _ = trrd(
                    log_probs(hidden, self.target[tokens]),
                    self.old[tokens],
                    self.teacher[tokens],
                    self.advantage[tokens],
                    **TRRD,
                )
                return -(self.token_weight[tokens] * surrogate).sum()

            return loss

        def materialising(hidden, target):
            return loss_schemes.materialising(hidden, self.weight, target, group, self.vocab)

        def megatron(hidden, target):
            return loss_schemes.megatron_cross_entropy(hidden, self.weight, target, group)

        def full(hidden, target):
            return loss_schemes.full_float32(hidden, self.shard, target)

        def chunked(hidden, target):
            return loss_schemes.chunked_recompute(hidden, self.shard, target, self.chunk)

        return {
            FUSED: fused,
            IN_PLACE: partial(fused, main_grad=self.main_grad),
            "materialising (ours)": from_log_probs(materialising),
            "Megatron-Core cross-entropy": from_log_probs(megatron),
            "full float32 log-softmax": from_log_probs(full),
            CHUNKED: from_log_probs(chunked),
        }

    def step(self, scheme: Callable, tokens: slice = slice(None)) -> Callable[[], None]:
        return lambda: scheme(self.hidden[tokens], tokens).backward()

    def products(self) -> Callable[[], None]:
        """logits, gradient of hidden, gradient of weight: all tokens at once, into preallocated buffers."""
        hidden, weight = self.hidden.detach(), self.shard.weight_VH.detach()
        logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.empty_like(weight)

        def run() -> None:
            torch.mm(hidden, weight.t(), out=logits)
            torch.mm(logits, weight, out=grad_hidden)
            torch.mm(logits.t(), hidden, out=grad_weight)

        return run

    def one_product(self) -> Callable[[], None]:
        hidden, weight = self.hidden.detach(), self.shard.weight_VH.detach()
        logits = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)
        return lambda: torch.mm(hidden, weight.t(), out=logits)

    def error(self, scheme: Callable) -> float:
        """Largest relative error of the two gradients against float64, on the first tokens."""
        tokens = slice(ORACLE_TOKENS)
        self.clear()
        self.main_grad.zero_()
        scheme(self.hidden[tokens], tokens).backward()
        made = (self.shard.weight_VH.grad, self.weight.grad, self.main_grad)
        weight_grad = next(grad for grad in made if grad is not None)[: self.shard.weight_VH.shape[0]]
        exact_hidden = self.hidden.detach()[tokens].double().requires_grad_()
        exact_weight = self.whole[: self.vocab].to(weight_grad.device).double().requires_grad_()
        log_probs = torch.log_softmax(exact_hidden @ exact_weight.t(), dim=-1)
        log_probs = log_probs.gather(1, self.target[tokens, None])[:, 0]
        others = (self.old, self.teacher, self.advantage)
        surrogate, _ = trrd(log_probs, *(value[tokens].double() for value in others), **TRRD)
        (-(self.token_weight[tokens].double() * surrogate).sum()).backward()
        shard = exact_weight.grad[self.shard.start :][: weight_grad.shape[0]]
        pairs = ((self.hidden.grad[tokens], exact_hidden.grad), (weight_grad, shard))
        return max(((ours.double() - exact).norm() / exact.norm()).item() for ours, exact in pairs)


def _print(run: dict) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{run['ranks']} ranks, {run['dtype']}")
    for column in ("scheme", "s", "ratio", "to", "x fused", "extra peak MB", "error"):
        table.add_column(column, justify="left" if column in ("scheme", "to") else "right")
    for name, row in run["schemes"].items():
        table.add_row(
            name,
            f"{row['seconds']:.3f}",
            f"{row['ratio']:.2f}",
            row["ratio_to"],
            f"{row['times_of_fused']:.2f}" if "times_of_fused" in row else "",
            f"{row['extra_peak_mb']:.0f}" if "extra_peak_mb" in row else "",
            f"{row['error']:.1e}" if "error" in row else "",
        )
    Console().print(table)


def _plot(result: dict, target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name, row in result["runs"][0]["schemes"].items() if "error" in row]
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained", sharey=True)
    height = 0.8 / len(result["runs"])
    shades = {"fp32": iter(("#9ecae1", "#3182bd", "#08519c")), "bf16": iter(("#fdd0a2", "#fd8d3c", "#a63603"))}
    for place, run in enumerate(result["runs"]):
        at = [i + (place + 0.5) * height for i in range(len(names))]
        look = {"label": f"{run['ranks']} rank{'s' * (run['ranks'] > 1)}, {run['dtype']}", "height": height * 0.92}
        look["color"] = next(shades[run["dtype"]])
        for axis, key, form in zip(axes, ("ratio", "extra_peak_mb"), ("{:.2f}", "{:,.0f}"), strict=True):
            bars = axis.barh(at, [run["schemes"][name][key] for name in names], **look)
            axis.bar_label(bars, fmt=form, padding=2, fontsize=7)
    titles = ("time, in units of the three bare matrix products", "extra peak memory of a rank, MB, gradients included")
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks([i + 0.4 for i in range(len(names))], names)
    axes[0].invert_yaxis()
    axes[0].axvline(1, color="black", linewidth=0.8)
    axes[0].legend(loc="upper right", fontsize=8)
    sizes = result["sizes"]
    figure.suptitle(
        f"TRRD loss and its gradients: {sizes['tokens']} tokens, hidden {sizes['hidden']}, vocabulary "
        f"{sizes['vocab']:,}, chunks of {sizes['chunk']}; {result['machine']['device']}, a thread a rank",
        fontsize=11,
    )
    figure.savefig(target, dpi=130)


if __name__ == "__main__":
    main()
