# matvae-serve in a container, as a user without rights.
#
#     docker build --target cpu -t matvae:cpu .       onnxruntime; a few hundred megabytes
#     docker build --target cuda -t matvae:cuda .     torch with its CUDA libraries; several gigabytes
#
# It listens on every interface, so it wants TLS and tokens (docs/security.md), or is told that the network itself keeps
# strangers out:
#
#     docker run --rm -p 50051:50051 -e MATVAE_INSECURE=1 matvae:cpu
#     docker run --rm -p 50051:50051 -e MATVAE_INSECURE=1 --gpus all matvae:cuda
#
# Every flag of matvae-serve has an environment variable: `docker run --rm matvae:cpu --help`.
ARG PYTHON=3.11

FROM python:${PYTHON}-slim AS source
WORKDIR /src
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY proto proto
COPY client client
COPY server server
COPY training training
COPY bench bench
RUN python -m venv /opt/matvae

FROM source AS build-cpu
RUN /opt/matvae/bin/pip install --no-cache-dir -c constraints.txt '.[server]'

FROM source AS build-cuda
RUN /opt/matvae/bin/pip install --no-cache-dir -c constraints.txt '.[gpu]'

FROM python:${PYTHON}-slim AS runtime
RUN useradd --uid 10001 --user-group --no-create-home matvae
ENV PATH=/opt/matvae/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    MATVAE_HOST=0.0.0.0 \
    MATVAE_PORT=50051 \
    MATVAE_HEALTH_PORT=50052 \
    MATVAE_METRICS_PORT=9090 \
    MATVAE_LOG_FORMAT=json
WORKDIR /empty
USER 10001:10001
EXPOSE 50051 50052 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["python", "-m", "matvae_server.probe"]
ENTRYPOINT ["matvae-serve"]

FROM runtime AS cuda
COPY --from=build-cuda /opt/matvae /opt/matvae
ENV MATVAE_RUNTIME=torch

# The last: what `docker build` without --target makes.
FROM runtime AS cpu
COPY --from=build-cpu /opt/matvae /opt/matvae
ENV MATVAE_RUNTIME=onnxruntime
