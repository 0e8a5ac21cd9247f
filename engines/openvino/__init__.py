"""OpenVINO: runs the graphs of a bundle on the CPU, where it can in bfloat16."""
