"""Write documents as token shards:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/tokenize.py --documents /mnt/danube/documents --tokenizer /mnt/danube/tokenizer \\
        --out /mnt/danube/tokens
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["tokenize", *sys.argv[1:]])
