"""`personae`, and `python -m personae`: the command line."""

import gc

from personae._start import start

start()
gc.disable()  # nothing that loads is garbage: looking for some takes a tenth of start-up
from personae.cli import main  # noqa: E402

gc.enable()
gc.freeze()

if __name__ == "__main__":
    main()
