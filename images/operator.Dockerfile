# The operator and the command-line tool. No torch: Python, the packages of requirements/operator.txt and 4 MB of code.
#
#   docker build -f images/operator.Dockerfile -t lockstep-operator:dev .
FROM debian:bookworm-slim

RUN python3 -c "import ensurepip" 2>/dev/null \
 || { apt-get update -qq \
      && apt-get install -y -qq --no-install-recommends ca-certificates python3 python3-venv \
      && rm -rf /var/lib/apt/lists/*; }

COPY images/install.sh /usr/local/sbin/install-packages
COPY requirements/operator.txt /opt/requirements/
RUN sh /usr/local/sbin/install-packages /opt/requirements/operator.txt

COPY crds/lockstep_api /opt/lockstep/app/lockstep_api
COPY operator/lockstep_operator /opt/lockstep/app/lockstep_operator
COPY operator/lockstep_cli /opt/lockstep/app/lockstep_cli
RUN /opt/lockstep/bin/python -m compileall -q /opt/lockstep/app

# A uid without an entry in /etc/passwd needs LOGNAME: kopf asks who it is. The root file system is read-only.
ENV PATH=/opt/lockstep/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 \
    LOGNAME=lockstep HOME=/tmp
USER 65532:65532
WORKDIR /tmp
ENTRYPOINT ["python3", "-m", "lockstep_operator"]
