"""Methods that choose a merge by data, one file each."""
