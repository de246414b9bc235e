"""`python -m infra.bench.encoder`."""

import typer

from infra.bench.encoder.encoder import main

if __name__ == "__main__":
    typer.run(main)
