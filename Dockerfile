# The environment of a GPU node, for trainer and rollout servers. requirements/README.md explains the versions.
#
#   docker build -t rlad-megatron .
#   enroot import -o rlad-megatron.sqsh dockerd://rlad-megatron        # for slurm/site.sh: RLAD_CONTAINER_IMAGE
#
# NVIDIA's image provides the CUDA 13.0 toolkit, cuDNN, NCCL with its network plugins, and the compilers. Its torch is
# not used: vLLM's wheels are built for one torch from PyPI, so everything is in a separate virtual environment.
FROM nvcr.io/nvidia/pytorch:25.10-py3

ENV VIRTUAL_ENV=/opt/rlad PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# The image sets this variable to pin its own packages.
ENV PIP_CONSTRAINT=
# Transformer Engine loads the cuDNN that it finds first, and torch the one of its wheels. These two variables together
# make both take the wheel's; the image's own is another version. They also drop the folders of the image's torch.
ENV CUDNN_HOME=$VIRTUAL_ENV/lib/python3.12/site-packages/nvidia/cudnn
ENV LD_LIBRARY_PATH=$CUDNN_HOME/lib:/usr/local/cuda/compat/lib:/usr/local/nvidia/lib:/usr/local/nvidia/lib64
RUN python3 -m venv "$VIRTUAL_ENV"
ENV PATH=$VIRTUAL_ENV/bin:$PATH

COPY requirements/gpu.txt /tmp/gpu.txt
RUN pip install --no-deps -r /tmp/gpu.txt

# PyPI has only the source. The C++ part is built against torch, with the image's compiler and CUDA.
ARG TRANSFORMER_ENGINE=2.11.0
RUN NVTE_FRAMEWORK=pytorch pip install --no-deps --no-build-isolation "transformer-engine-torch==$TRANSFORMER_ENGINE"

# Optional: NVIDIA's apex, with which Megatron's own linear layers add gradients in float32; Transformer Engine's, which
# recipes use, need none. PyPI's package of that name is a different one. --build-arg APEX_REVISION=<commit of github.com/NVIDIA/apex>
ARG APEX_REVISION=
RUN if [ -n "$APEX_REVISION" ]; then \
        APEX_CPP_EXT=1 APEX_CUDA_EXT=1 pip install --no-deps --no-build-isolation \
            "apex @ git+https://github.com/NVIDIA/apex@$APEX_REVISION"; \
    fi

WORKDIR /opt/rlad-megatron
COPY pyproject.toml README.md LICENSE ./
COPY rlad_megatron rlad_megatron
COPY recipes recipes
COPY studies studies
RUN pip install --no-deps --no-build-isolation . && useradd --create-home --uid 10001 rlad

USER 10001
WORKDIR /home/rlad
HEALTHCHECK NONE
# Fails the build if the command does not run.
RUN rlad --help
CMD ["rlad", "--help"]
