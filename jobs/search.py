"""Search a proxy's settings before the large run:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/search.py proxy_20m --tokens-dir /mnt/danube/tokens --out /mnt/danube/runs/search
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["search", *sys.argv[1:]])
