# Sourced on every node, from ~/.bashrc and before Ray starts.
export PATH="$HOME/lmsat/.venv/bin:$PATH"
export RAY_AUTH_MODE=token # the token itself lies in ~/.ray/auth_token
export RAY_USAGE_STATS_ENABLED=0
export RAY_worker_niceness=0 # at Ray's 15, workers starve beside anything else
if [ -d /shared ]; then export LMSAT_CACHE=/shared/lmsat-cache; fi
