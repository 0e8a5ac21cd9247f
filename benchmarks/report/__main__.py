"""`python -m benchmarks.report`: write the page of all results."""

from benchmarks.report.page import main

if __name__ == "__main__":
    main()
