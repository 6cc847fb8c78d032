"""Score a Hugging Face folder on held-out tokens and on tasks:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/evaluate.py /mnt/danube/runs/dpo/model --tokens /mnt/danube/tokens --out /mnt/danube/evaluation
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["evaluate", *sys.argv[1:]])
