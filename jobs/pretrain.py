"""Pretrain a preset, or go on with the stopped run of that name:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/pretrain.py nano --tokens-dir /mnt/danube/tokens --output-dir /mnt/danube/runs
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["pretrain", *sys.argv[1:]])
