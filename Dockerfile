# The service as an image: `docker build -t orders .`, then `docker run orders` (serve), `docker run orders migrate`, ...

# 1. Wheels become an environment: every dependency by the hash that the project pins, then the project itself.
FROM python:3.13-slim AS build
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore
RUN python -m venv --without-pip /opt/orders
WORKDIR /src
COPY requirements/build.txt requirements/runtime.txt requirements/
# The cache is the builder's and stays out of the image.
# hadolint ignore=DL3042
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --quiet --require-hashes --requirement requirements/build.txt \
    && pip --python /opt/orders/bin/python install --quiet --require-hashes --requirement requirements/runtime.txt
COPY pyproject.toml README.md LICENSE ./
COPY app app
COPY migrations migrations
COPY load load
COPY sandbox sandbox
RUN pip wheel --quiet --no-cache-dir --no-deps --no-build-isolation --wheel-dir /wheels . \
    && pip --python /opt/orders/bin/python install --quiet --no-cache-dir --no-deps --no-index /wheels/*.whl

# 2. The interpreter, that environment, and a user who owns nothing.
FROM python:3.13-slim
LABEL org.opencontainers.image.title="orders" \
      org.opencontainers.image.description="An orders service that never loses an order, never charges twice and never gets stuck in silence" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN useradd --uid 10001 --user-group --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin orders \
    && install --directory --owner=orders --group=orders /data
COPY --from=build /opt/orders /opt/orders
# Containers are reached over their network only, and logs go line by line.
ENV PATH=/opt/orders/bin:$PATH ORDERS_HOST=0.0.0.0 PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /data
EXPOSE 8000
# The process is up; whether it can do its work is /readyz's to say, and no reason to restart it.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s \
    CMD ["python", "-m", "app.healthcheck"]
ENTRYPOINT ["orders"]
CMD ["serve"]
