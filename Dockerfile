# megatron_fipo on NVIDIA's PyTorch image, whose torch, CUDA, NCCL and TransformerEngine stay; no engine is patched.
#
#   docker build -t megatron_fipo .
#   docker run --gpus all --ipc host --ulimit memlock=-1 megatron_fipo python -m megatron_fipo.doctor
#   enroot import -o megatron_fipo.sqsh dockerd://megatron_fipo        # for examples/slurm/train.sbatch
#
# 26.05 has torch 2.12.0a0 for CUDA 13.2. The image must have torch 2.10 or newer, and not its pre-release: 25.12's
# 2.10.0a0 counts as older than 2.10.
ARG IMAGE=nvcr.io/nvidia/pytorch:26.05-py3
# hadolint ignore=DL3006
FROM ${IMAGE}

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
WORKDIR /opt/megatron_fipo

# Build tools first: the extension is compiled against the image's torch, so without build isolation. The image has them
# as a rule, and its constraints choose their versions.
# hadolint ignore=DL3013
RUN pip install --no-cache-dir ninja pybind11 'setuptools>=77'

COPY pyproject.toml setup.py README.md LICENSE ./
COPY requirements requirements
COPY csrc csrc
COPY megatron_fipo megatron_fipo
COPY tools tools
COPY examples examples
# The image's own constraints (PIP_CONSTRAINT, /etc/pip/constraint.txt) hold for what it was tested with; transformers
# and what moves with it are ours. keep.txt adds torch itself: its version is on no index, so a dependency that wants
# another one ends the build. CUDA=1: never without the kernels.
RUN sed -i -E '/^(transformers|tokenizers|huggingface[-_]hub)[=<>]/Id' /etc/pip/constraint.txt \
    && python -c 'import torch; print(f"torch=={torch.__version__}")' >/tmp/keep.txt \
    && grep '^transformers==' requirements/base.txt >>/tmp/keep.txt \
    && MEGATRON_FIPO_CUDA=1 pip install --no-cache-dir --no-build-isolation --constraint /tmp/keep.txt --editable . \
    && rm /tmp/keep.txt

# What must hold without a GPU at hand: the operators load and have their kernels, TransformerEngine is the image's.
RUN python -c 'from importlib.metadata import version; import megatron_fipo.ops; from megatron_fipo import _host; \
print(_host.build_info(), "transformer_engine", version("transformer_engine"))'
