"""``python -m vtwcli``, the form that process launchers such as ``accelerate launch -m`` need."""

from vtwcli.cli import main

if __name__ == "__main__":
    main()
