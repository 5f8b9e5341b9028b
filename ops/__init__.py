"""What people run: the command line, embedded servers, the market simulator, benchmarks."""
