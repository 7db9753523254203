# Sourced by the scripts that run a recipe, in the repository's root.

# Prints the file of RECIPE, a name in recipes/ or the path of a YAML or JSON file of flags.
# Usage: file=$(recipe_file RECIPE [FURTHER FLAGS])
recipe_file() {
  local recipe=${1:-} file names flag
  file=recipes/$recipe.yaml
  if [ ! -f "$file" ]; then file=$recipe; fi
  if [ ! -f "$file" ]; then
    printf -v names '%s, ' recipes/*.yaml
    names=${names//recipes\//}
    names=${names//.yaml/}
    echo "recipe '$recipe': not found, give the path of a YAML file or one of ${names%, }" >&2
    return 2
  fi
  for flag in "${@:2}"; do
    case $flag in --config_file* | --config-file*)
      echo "$flag: would replace the whole recipe $recipe, give your file as the recipe instead" >&2
      return 2
      ;;
    esac
  done
  printf '%s\n' "$file"
}
