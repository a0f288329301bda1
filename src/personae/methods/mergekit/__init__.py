"""What mergekit means by names that mean another algorithm here (`conventions: mergekit`)."""
