"""The GPU suite: `make gpu` on a machine with a GPU."""
