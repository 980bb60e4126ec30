"""`python -m treelora_cli` does what `treelora` does."""

from treelora_cli.cli.app import main

if __name__ == "__main__":
    main()
