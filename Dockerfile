# docker build -t transduce .                      the CPU image
# docker build -t transduce:cuda --target cuda .   the one for NVIDIA GPUs; CUDA and cuDNN come as wheels
#
# What is installed is what deploy/lock says, by hash (make lock), and nothing besides. Nothing is compiled, and neither pip nor
# what builds the package's own wheel gets into the environment: the result is the base, one virtual environment, and the
# default model within it.

ARG BASE=python:3.11-slim

FROM ${BASE} AS wheel
WORKDIR /source
COPY deploy/lock/build.txt deploy/lock/build.txt
RUN python -m pip install --no-cache-dir --disable-pip-version-check --root-user-action=ignore \
        --require-hashes --only-binary :all: --target /build -r deploy/lock/build.txt
COPY pyproject.toml README.md LICENSE ./
COPY service service
RUN PYTHONPATH=/build python -m pip wheel --disable-pip-version-check --no-deps --no-build-isolation --no-cache-dir \
        --wheel-dir /wheels .

FROM ${BASE} AS environment-cpu
COPY deploy/lock/cpu.txt /lock.txt
RUN python -m venv --without-pip /opt/transduce \
    && python -m pip --python /opt/transduce/bin/python install --no-cache-dir --disable-pip-version-check \
        --require-hashes --no-deps --only-binary :all: -r /lock.txt \
    && find /opt/transduce -type d \( -name tests -o -path '*/onnxruntime/transformers' \) -prune -exec rm -r {} +
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip --python /opt/transduce/bin/python install --no-cache-dir --disable-pip-version-check \
        --no-deps --no-index /wheels/*.whl

FROM ${BASE} AS environment-cuda
COPY deploy/lock/gpu.txt /lock.txt
RUN python -m venv --without-pip /opt/transduce \
    && python -m pip --python /opt/transduce/bin/python install --no-cache-dir --disable-pip-version-check \
        --require-hashes --no-deps --only-binary :all: -r /lock.txt \
    && find /opt/transduce -type d \( -name tests -o -path '*/onnxruntime/transformers' \) -prune -exec rm -r {} +
RUN --mount=type=bind,from=wheel,source=/wheels,target=/wheels \
    python -m pip --python /opt/transduce/bin/python install --no-cache-dir --disable-pip-version-check \
        --no-deps --no-index /wheels/*.whl

FROM ${BASE} AS runtime
LABEL org.opencontainers.image.title="transduce" \
      org.opencontainers.image.description="An inference service for encoder-decoder transformers" \
      org.opencontainers.image.licenses="Apache-2.0 AND CC-BY-2.0-FR"
ENV PATH=/opt/transduce/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    ORT_DISABLE_TELEMETRY=1 \
    TRANSDUCE_HOST=0.0.0.0
WORKDIR /opt/transduce
USER 10001:10001
EXPOSE 8000
# Healthy is ready: loaded, warm and not draining. The first look after a start comes within seconds.
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --start-interval=1s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen('http://127.0.0.1:' + os.environ.get('TRANSDUCE_PORT', '8000') + '/readyz', timeout=4)"]
ENTRYPOINT ["transduce"]
CMD ["serve"]

FROM runtime AS cuda
ENV NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
COPY --from=environment-cuda /opt/transduce /opt/transduce

# The last one is what a build without --target makes.
FROM runtime AS cpu
COPY --from=environment-cpu /opt/transduce /opt/transduce
