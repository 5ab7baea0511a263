"""One file for each kind of input; each defines TARGET (`frame.Target`) and is found by itself."""
