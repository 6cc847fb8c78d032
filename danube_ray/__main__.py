"""`python -m danube_ray VERB`, where the `danube` command is not on the path."""

from danube_ray.cli import main

if __name__ == "__main__":
    main()
