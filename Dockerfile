# One image for every service of docker-compose.yml. Build with --build-arg TORCH=... to choose a
# build of torch, for example "torch==2.13.0+cpu" where your package index has CPU builds.
FROM python:3.12-slim

ARG TORCH="torch>=2.6"
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1
WORKDIR /srv/sutra

RUN pip install "$TORCH"
COPY pyproject.toml README.md ./
COPY sutra_tasks sutra_tasks
RUN pip install ".[worker,distill,local,cli,flower]" nvidia-ml-py
COPY celeryconfig.py ./
COPY workers workers

# A new volume takes the owner of the folder that it is mounted on.
RUN useradd --create-home sutra && mkdir -p /models /home/sutra/.cache && chown sutra:sutra /models /home/sutra/.cache
USER sutra
CMD ["celery", "-A", "workers.router", "worker", "--hostname=router@%h"]
