"""Serve GGUF files from the cluster's head until the job is stopped:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/serve.py chat=/mnt/danube/gguf/Q4_K_M.gguf --tokenizer /mnt/danube/runs/dpo/model --host 0.0.0.0
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["serve", *sys.argv[1:]])
