"""Write a Hugging Face folder as GGUF files, with what each level costs:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/quantize.py /mnt/danube/runs/dpo/model --tokens /mnt/danube/tokens --out /mnt/danube/gguf
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["quantize", *sys.argv[1:]])
