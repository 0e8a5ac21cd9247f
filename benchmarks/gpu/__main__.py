"""`python -m benchmarks.gpu`: measure what is to be reached on a GPU."""

from benchmarks.gpu.run import main

if __name__ == "__main__":
    main()
