#!/bin/sh
# Install pinned packages into /opt/lockstep: install.sh REQUIREMENTS…
#
# Uses uv where the builder brings it (mounted, so that it and its cache stay out of the image), otherwise pip. Hashes are
# required either way, and modules are compiled now: the running container can't write beside them.
set -eu

environment=/opt/lockstep
for file; do set -- "$@" -r "$file"; shift; done

if command -v uv >/dev/null; then
    [ -d "$environment" ] || uv venv --quiet --python /usr/bin/python3 "$environment"
    # The certificates that the builder trusts, and copies: a hard link into a mounted cache would not reach the image.
    UV_SYSTEM_CERTS=1 UV_LINK_MODE=copy uv pip install --python "$environment/bin/python" --require-hashes --compile-bytecode "$@"
else
    [ -d "$environment" ] || /usr/bin/python3 -m venv "$environment"
    [ ! -s /run/ca.crt ] || export PIP_CERT=/run/ca.crt
    "$environment/bin/python" -m pip install --require-hashes --no-cache-dir --disable-pip-version-check "$@"
fi

# Lockstep's own packages are copied to one folder, the last and smallest layer.
echo /opt/lockstep/app >"$(echo "$environment"/lib/python3*/site-packages)/lockstep.pth"
