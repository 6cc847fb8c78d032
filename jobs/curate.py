"""Clean raw text into documents on every CPU of a cluster:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/curate.py web=/mnt/danube/text/web wiki=/mnt/danube/text/wiki --out /mnt/danube/documents
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["curate", *sys.argv[1:]])
