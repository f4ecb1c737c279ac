"""A server that is never done with an image: `python busy_server.py FLAGS`. Its workers are not, either."""

import threading

from matvae_server import cli, images


def never(*_: object) -> None:
    print("decoding", flush=True)
    threading.Event().wait()


images.decode = never  # type: ignore[assignment]

if __name__ == "__main__":
    raise SystemExit(cli.main())
