"""The fleet on Kubernetes: what is generated for its manifests, how manifests are checked, how a pod drains."""
