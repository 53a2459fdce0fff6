"""Rewrites of graphs: of the exported forward, of the joint graph, of the placed one."""
