"""The cost model: what a job will need, said before anything is loaded."""
