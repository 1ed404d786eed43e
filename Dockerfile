# The image of every pod: Ray, the engine, the fleet, the bundled model, the dashboards. Two targets, one recipe:
#
#   docker build --target cpu --tag trifleet:0.1.0-cpu .
#   docker build --target gpu --tag trifleet:0.1.0-gpu .
#
# Where your package index has no CPU build of PyTorch (PyPI has none): --build-arg PIP_ARGS="--extra-index-url URL",
# with PyTorch's own index of CPU wheels, which PyTorch's installation page names.
FROM python:3.11.13-slim-bookworm AS base
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# g++: torch.compile and Triton compile at run time. libnuma1: vLLM's CPU kernels. make: the build is `make setup`.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ libnuma1 make \
    && rm -rf /var/lib/apt/lists/* \
    && groupadd --gid 1000 trifleet \
    && useradd --uid 1000 --gid 1000 --create-home trifleet
WORKDIR /opt/trifleet/source

# As on any machine: the pinned list, then the project, into a virtual environment.
FROM base AS build
ARG PIP_ARGS=""
ENV PIP_NO_CACHE_DIR=1
COPY . .

FROM build AS build-cpu
RUN make setup VENV=/opt/trifleet/venv REQUIREMENTS=requirements/cpu.txt PIP_ARGS="${PIP_ARGS}"

FROM build AS build-gpu
RUN make setup VENV=/opt/trifleet/venv REQUIREMENTS=requirements/gpu.txt PIP_ARGS="${PIP_ARGS}"

FROM base AS runtime
ENV PATH=/opt/trifleet/venv/bin:$PATH \
    HOME=/home/trifleet \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
# KubeRay starts Ray from a shell, which may be a login shell: that one sets PATH anew.
RUN echo "export PATH=/opt/trifleet/venv/bin:\$PATH" > /etc/profile.d/trifleet.sh
EXPOSE 8000
ENTRYPOINT ["/opt/trifleet/venv/bin/trifleet"]
CMD ["--help"]

FROM runtime AS cpu
COPY --from=build-cpu /opt/trifleet /opt/trifleet
RUN python -m deploy.haproxy /opt/trifleet/haproxy
USER 1000:1000

FROM runtime AS gpu
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=build-gpu /opt/trifleet /opt/trifleet
RUN python -m deploy.haproxy /opt/trifleet/haproxy
USER 1000:1000
