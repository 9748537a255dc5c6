"""The verbs as Python functions; the command line is a thin skin over them.

A verb's module imports torch only inside its functions, so that its signature (the command's options) can
be read in no time.
"""
