"""Carry a model over to another tokenizer, to go on pretraining it:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/remap.py /mnt/danube/danube-1.8b --new-tokenizer /mnt/danube/mistral --out /mnt/danube/danube2-start
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["remap", *sys.argv[1:]])
