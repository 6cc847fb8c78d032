"""Train the quality models that curation scores documents with:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/quality.py train --good wiki=/mnt/danube/text/wiki --raw web=/mnt/danube/text/web \\
        --out /mnt/danube/quality
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["quality", *sys.argv[1:]])
