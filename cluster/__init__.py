"""The life of a cluster: files and helpers around the job."""
