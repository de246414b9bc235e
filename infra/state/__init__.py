"""What `streamformer state` does: look at the state of an application, and move it on purpose."""
