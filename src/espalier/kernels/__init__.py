"""The few inner loops that earn their own file, each with a plain twin that tests hold it against."""
