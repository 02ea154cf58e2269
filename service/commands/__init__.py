"""The service's subcommands: serve, translate, check, bench."""
