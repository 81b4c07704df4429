#!/usr/bin/env bash
# Bring a node to the versions of constraints.txt, in ~/lmsat/.venv; nothing happens the second
# time. Arguments are further packages.
set -euo pipefail
cd ~/lmsat
[ -x .venv/bin/pip ] || python3 -m venv .venv
.venv/bin/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lmsat needs Python 3.11 or newer")'
.venv/bin/pip install --quiet --constraint constraints.txt --editable . "$@"
grep -qxF '. ~/lmsat/clusters/env.sh' ~/.bashrc || echo '. ~/lmsat/clusters/env.sh' >> ~/.bashrc
chmod 600 ~/.ray/auth_token
