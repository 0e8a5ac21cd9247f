"""`python -m benchmarks.accuracy`: accuracy over the number of tokens."""

from benchmarks.accuracy.curves import main

if __name__ == "__main__":
    main()
