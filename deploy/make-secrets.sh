#!/usr/bin/env bash
# Makes every secret that docker-compose.yml mounts, each in a file of its own: deploy/secrets, or the folder that is named.
# What is there already stays, so it may be run again at any time.
set -euo pipefail
umask 077
folder=${1:-"$(dirname "$0")/secrets"}

# Containers see these files as the host has them, and run as users that the host does not know: so anybody may read the files,
# and nobody but the owner may enter the folder. Docker mounts file by file and does not mind.
mkdir -p "$folder"
chmod 0700 "$folder"

random() { head -c 24 /dev/urandom | od -An -vtx1 | tr -d ' \n'; }

# keep NAME VALUE: write the file unless it is there. It appears whole or not at all.
keep() {
  local file=$folder/$1
  if [[ ! -e $file ]]; then
    [[ -n $2 || $1 == hf_token ]] || { echo "make-secrets: no value for $1" >&2; exit 1; }
    printf '%s' "$2" > "$file.new"
    chmod 0444 "$file.new"
    mv "$file.new" "$file"
  fi
}

keep key_pepper "$(random)"
keep engine_token "$(random)"
keep metrics__token "$(random)"
keep grafana_password "$(random)" # of its user admin
keep hf_token "" # of an account at huggingface.co, for gated bases

keep postgres_password "$(random)"
for role in owner api system; do
  keep "${role}_password" "$(random)"
  password=$(< "$folder/${role}_password")
  keep "database__${role}_url" "postgresql+psycopg://tunesmith_${role}:${password}@postgres:5432/tunesmith"
done

keep valkey_password "$(random)"
password=$(< "$folder/valkey_password")
keep valkey_configuration "requirepass ${password}
save \"\"
appendonly no
"
keep broker_url "redis://:${password}@valkey:6379/0"

keep storage__secret_key "$(random)"
secret_key=$(< "$folder/storage__secret_key")
keep s3_configuration '{"identities": [{"name": "tunesmith", "actions": ["Admin", "Read", "Write", "List", "Tagging"],
  "credentials": [{"accessKey": "tunesmith", "secretKey": "'"$secret_key"'"}]}]}
'
