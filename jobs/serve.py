"""Serve what a configuration file says until the job is stopped; answers under way then have 630 s to end:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . \\
        --runtime-env-json '{"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "630"}}' -- \\
        python jobs/serve.py --config /mnt/danube/serve.yaml
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["serve", *sys.argv[1:]])
