# The image of the worker. mlflow/compose.yaml runs both servers from it too.
#
#   docker build --tag finetune .                                      # CUDA: torch of the package index
#   docker build --tag finetune:cpu --build-arg PACKAGES=bubblewrap --build-arg TORCH_INDEX=URL .
#
# URL is an index of CPU builds of torch, such as PyTorch's own.
# docs/scale.md describes the settings of a container. tests/scale/test_image.py builds this file with buildah on Debian's
# python3, and trains in it.

# Any Debian or Ubuntu with Python 3.11 to 3.13 and its module venv.
ARG BASE=python:3.12-slim
FROM ${BASE}

# bubblewrap runs generated code (ops/sandbox). On a GPU, Triton compiles a small C file before a kernel's first use, and
# fails without a C compiler and Python.h: where python3 is Debian's own, add python3-dev. A CPU needs neither.
ARG PACKAGES="bubblewrap gcc libc6-dev"
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ${PACKAGES} \
    && rm -rf /var/lib/apt/lists/*

# The dependencies, in a layer that only pyproject.toml and constraints.txt change. pip reads the secret `pip` as its
# configuration, if there is one: an index, a proxy and certificates belong to the place of the build, not to the image.
ARG TORCH_INDEX=
WORKDIR /finetune
COPY pyproject.toml constraints.txt ./
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    python3 -m venv /venv \
    && /venv/bin/python -c "import tomllib; project = tomllib.load(open('pyproject.toml', 'rb'))['project']; \
extras = project['optional-dependencies']; print(*project['dependencies'], *extras['postgres'], *extras['s3'], sep='\n')" \
       > /tmp/requirements.txt \
    && /venv/bin/pip install --no-cache-dir -c constraints.txt -r /tmp/requirements.txt \
       ${TORCH_INDEX:+--extra-index-url "${TORCH_INDEX}"} \
    && rm /tmp/requirements.txt

# The project, as a checkout of which everything is imported: settings of MLflow's server and prefect.yaml are files in it.
COPY . .
RUN --mount=type=secret,id=pip,target=/etc/pip.conf \
    /venv/bin/pip install --no-cache-dir --no-deps --editable . \
    && /venv/bin/python -m compileall -q flows tasks model ops \
    && useradd --uid 1000 --create-home finetune \
    && mkdir /data /locks \
    && chown finetune: /data /locks

# The commit is recorded with each run; .git is not in the image.
ARG COMMIT=
ENV PATH=/venv/bin:$PATH \
    FINETUNE_COMMIT=${COMMIT} \
    FINETUNE_DATA_ROOT=/data \
    FINETUNE_LOCKS=/locks \
    PREFECT_HOME=/data/prefect \
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30 \
    PREFECT_SERVER_ALLOW_EPHEMERAL_MODE=false \
    PREFECT_SERVER_ANALYTICS_ENABLED=false \
    DO_NOT_TRACK=true \
    PYTHONUNBUFFERED=1
USER finetune
# Flow runs start in an empty directory of the worker, and must not find a file of the checkout by accident.
WORKDIR /data

# The worker answers on this port while it polls Prefect's server. Images in OCI's format have no health check.
HEALTHCHECK --interval=30s --timeout=10s --start-period=60s \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8080/health', timeout=5)"]

# PREFECT_API_URL and MLFLOW_TRACKING_URI name the servers. The worker has the name of its machine. When the container is
# stopped (SIGTERM) it ends after its flow runs, each of which saves a checkpoint.
CMD ["python", "-m", "ops.stack.worker", "--with-healthcheck"]
