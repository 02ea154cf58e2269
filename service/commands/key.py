"""`transduce key`: a new API key."""

import argparse


def register(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the parser."""
    parser = subparsers.add_parser(
        "key",
        help="make an API key",
        description="Make an API key. The first line is the key, for the client; it is stored nowhere. The second is "
        "its entry, for --api-key-file or --api-keys of transduce serve, which knows a key by its hash.",
        allow_abbrev=False,
    )
    parser.add_argument("name", metavar="NAME", help="of the client who gets it: letters, digits, dots, dashes")
    parser.set_defaults(func=run)


def run(arguments: argparse.Namespace) -> int:
    """Print the key and its entry."""
    from service.keys import make_key  # not before it runs: it brings the web framework

    key, entry = make_key(arguments.name)
    print(key)
    print(entry)
    return 0
