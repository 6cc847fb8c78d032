"""Align a Hugging Face folder on preference pairs:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/dpo.py --name dpo --base /mnt/danube/runs/chat/model --data /mnt/danube/pairs.jsonl \\
        --output-dir /mnt/danube/runs
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["dpo", *sys.argv[1:]])
