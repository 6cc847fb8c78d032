"""Fine-tune a Hugging Face folder on conversations:

    RAY_AUTH_MODE=token ray job submit --address http://127.0.0.1:8265 --working-dir . -- \\
        python jobs/sft.py --name chat --base /mnt/danube/model --data /mnt/danube/chat.jsonl \\
        --output-dir /mnt/danube/runs
"""

import sys

if __name__ == "__main__":
    del sys.path[0]  # this folder: its tokenize.py would hide Python's own
    from danube_ray.cli import main

    main(["sft", *sys.argv[1:]])
