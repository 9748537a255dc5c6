"""Methods that make a finished delta smaller. A file each, imported by nothing."""
