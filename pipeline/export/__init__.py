"""From codes to the files that runtimes load, and proof that they agree."""
