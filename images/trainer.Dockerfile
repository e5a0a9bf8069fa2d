# Agent and trainer. No kopf. Layers from the largest and most lasting to the smallest: torch (5 GB with CUDA), the other
# packages, Lockstep's own code; so a change of code moves megabytes.
#
#   docker build -f images/trainer.Dockerfile -t lockstep-trainer:dev .
FROM debian:bookworm-slim

RUN python3 -c "import ensurepip" 2>/dev/null \
 || { apt-get update -qq \
      && apt-get install -y -qq --no-install-recommends ca-certificates python3 python3-venv \
      && rm -rf /var/lib/apt/lists/*; }

COPY images/install.sh /usr/local/sbin/install-packages
COPY requirements/torch.txt /opt/requirements/
RUN sh /usr/local/sbin/install-packages /opt/requirements/torch.txt

COPY requirements/trainer.txt /opt/requirements/
RUN sh /usr/local/sbin/install-packages /opt/requirements/trainer.txt

COPY crds/lockstep_api /opt/lockstep/app/lockstep_api
COPY trainer/lockstep_trainer /opt/lockstep/app/lockstep_trainer
RUN /opt/lockstep/bin/python -m compileall -q /opt/lockstep/app

# A uid without an entry in /etc/passwd needs LOGNAME: torch's caches and users' tools ask who they are.
ENV PATH=/opt/lockstep/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LOGNAME=lockstep HOME=/tmp
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["python3", "-m", "lockstep_trainer.supervisor"]
