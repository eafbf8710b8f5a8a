"""What benchmarks that hold forgetting against retraining share: settings, judges, tables."""
